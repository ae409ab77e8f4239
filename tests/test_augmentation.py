"""Augmentation: each view is what its name says, drawn for each image, and the same for a seed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from augmentation import (
    POLICIES,
    add_noise_to_batch,
    adjust_batch_brightness,
    adjust_batch_contrast,
    apply_views,
    augment_batch,
    example_views,
    flip_batch_horizontally,
    flip_batch_vertically,
    resolve_policy,
    rotate_batch,
)

VIEWS = [
    flip_batch_horizontally,
    flip_batch_vertically,
    adjust_batch_brightness,
    adjust_batch_contrast,
    rotate_batch,
    add_noise_to_batch,
    augment_batch,
]
FLIPS = [(flip_batch_horizontally, 3), (flip_batch_vertically, 2)]
SIZES = [(32, 32), (24, 48), (48, 24), (31, 20)]

each_view = pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
each_flip = pytest.mark.parametrize(("flip", "dim"), FLIPS, ids=["horizontally", "vertically"])
each_size = pytest.mark.parametrize(("height", "width"), SIZES)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def seeded(seed=0, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def random_images(count, height=12, width=15, seed=1):
    return torch.rand(count, 3, height, width, generator=seeded(seed))


def identical_images(count, height=12, width=15):
    return random_images(1, height, width).expand(count, -1, -1, -1).clone()


def two_tone_images(count, dark, light, size=8):
    """Left half dark, right half light."""
    images = torch.full((count, 3, size, size), dark)
    images[..., size // 2 :] = light
    return images


def assert_even(values, low, high):
    """Fails for values out of [low, high], and for those not spread evenly over it (p < 0.1 %)."""
    values = np.asarray(values, dtype=float)
    assert low - 1e-5 <= values.min()
    assert values.max() <= high + 1e-5
    assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 0.001


def ramps(count, height, width, slope=0.01):
    """Channel 0 rises by `slope` a pixel to the right, channel 1 downwards, 2 is smooth."""
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2,
        torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    smooth = 0.5 + 0.25 * torch.sin(x / 3) * torch.cos(y / 4) + 0.005 * x - 0.004 * y
    image = torch.stack([0.5 + slope * x, 0.5 + slope * y, smooth])
    return image.expand(count, -1, -1, -1).clone()


def measured_maps(turned, slope=0.01):
    """For each image of turned ramps, the matrix A and the shift b of `source = A @ (x, y) + b`.

    From the middle of the image alone, where nothing comes from beyond an edge: there bilinear
    sampling of a ramp is exact.
    """
    height, width = turned.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2,
        torch.arange(width) - (width - 1) / 2,
        indexing="ij",
    )
    middle = x**2 + y**2 <= (min(height, width) / 2 - 2) ** 2
    design = torch.stack([x[middle], y[middle], torch.ones_like(x[middle])], dim=1).double()
    sources = (turned[:, :2, middle].double() - 0.5) / slope
    fit = torch.linalg.lstsq(design.expand(len(turned), -1, -1), sources.mT).solution
    assert torch.allclose(design @ fit, sources.mT, atol=1e-3)
    return fit[:, :2].mT, fit[:, 2]


def measured_degrees(turned):
    matrices, _ = measured_maps(turned)
    return torch.rad2deg(torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])).numpy()


# What holds for every view


@settings(deadline=None)
@given(
    view=st.sampled_from(VIEWS),
    count=st.integers(1, 3),
    height=st.integers(4, 20),
    width=st.integers(4, 20),
    seed=st.integers(0, 2**32),
)
def test_every_batch_keeps_its_shape_and_type_and_stays_between_0_and_1(
    view, count, height, width, seed
):
    images = random_images(count, height, width, seed).mul(3).sub(1).clamp(0, 1)
    views = view(images, seeded(seed))
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert views.device == images.device
    assert views.isfinite().all()
    assert views.min() >= 0
    assert views.max() <= 1


@each_view
def test_the_same_seed_gives_the_same_views_and_another_seed_gives_others(view):
    images = random_images(8)
    assert torch.equal(view(images, seeded(5)), view(images, seeded(5)))
    assert not torch.equal(view(images, seeded(5)), view(images, seeded(6)))


@each_view
def test_the_generator_moves_on_so_that_the_next_views_are_others(view):
    images, generator = random_images(8), seeded()
    assert not torch.equal(view(images, generator), view(images, generator))


@each_view
def test_the_global_random_state_is_neither_read_nor_changed(view):
    images = random_images(4)
    before = torch.get_rng_state()
    views = view(images, seeded())
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(view(images, seeded()), views)


@each_view
def test_each_image_of_the_batch_is_drawn_on_its_own(view):
    views = view(identical_images(64), seeded())
    different = {image.numpy().tobytes() for image in views}
    assert len(different) == 2 if "flip" in view.__name__ else len(different) == 64


@each_view
def test_the_images_given_are_left_unchanged_and_share_nothing_with_the_views(view):
    images = random_images(4)
    before = images.clone()
    view(images, seeded()).fill_(0.5)
    assert torch.equal(images, before)


@each_view
def test_the_views_do_not_depend_on_how_the_batch_lies_in_memory(view):
    images = random_images(4)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(view(images, seeded()), view(channels_last, seeded()), atol=1e-6)


@each_view
def test_a_batch_of_one_image_is_augmented_too(view):
    image = random_images(1)
    views = [view(image, seeded(seed)) for seed in range(8)]
    assert any(not torch.equal(view, image) for view in views)


@needs_cuda
@each_view
def test_views_of_a_batch_on_the_gpu_are_made_there_and_depend_on_the_seed_alone(view):
    images = random_images(8).cuda()
    views = view(images, seeded(5, "cuda"))
    assert views.device == images.device
    assert torch.equal(views, view(images, seeded(5, "cuda")))
    assert 0 <= views.min() <= views.max() <= 1


# Flips


@each_flip
def test_half_of_many_images_are_exact_mirrors_and_the_others_exactly_themselves(flip, dim):
    images = random_images(400)
    views = flip(images, seeded())
    mirrored = (views == images.flip(dim)).flatten(1).all(dim=1)
    untouched = (views == images).flatten(1).all(dim=1)
    assert (mirrored ^ untouched).all()
    assert 160 <= mirrored.sum() <= 240  # within 4 standard deviations of 200


@each_flip
def test_the_probability_of_a_flip_can_be_chosen(flip, dim):
    images = random_images(400)
    assert torch.equal(flip(images, seeded(), probability=0.0), images)
    assert torch.equal(flip(images, seeded(), probability=1.0), images.flip(dim))
    flipped = (flip(images, seeded(), probability=0.1) != images).flatten(1).any(dim=1)
    assert 16 <= flipped.sum() <= 64


# Brightness and contrast


def test_brightness_multiplies_each_image_by_a_factor_from_0_8_to_1_2():
    images = random_images(500, 4, 4).mul(0.5).add(0.1)
    factors = adjust_batch_brightness(images, seeded()) / images
    one_each = factors.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(factors, one_each.expand_as(factors), atol=1e-5)
    assert_even(one_each.flatten(), 0.8, 1.2)


def test_brightness_stops_at_white():
    views = adjust_batch_brightness(torch.ones(50, 3, 4, 4), seeded())
    assert views.max() == 1
    assert 0.8 <= views.min() < 0.85


def test_contrast_scales_the_distance_from_the_images_own_mean_by_0_8_to_1_2():
    images = two_tone_images(500, dark=0.3, light=0.5)
    images[250:] += 0.2
    views = adjust_batch_contrast(images, seeded())
    means = images.mean(dim=(1, 2, 3))
    assert torch.allclose(views.mean(dim=(1, 2, 3)), means, atol=1e-6)
    factors = (views[:, 0, 0, -1] - views[:, 0, 0, 0]) / 0.2
    assert_even(factors, 0.8, 1.2)


def test_contrast_pulls_colours_towards_one_grey_for_all_channels():
    image = torch.tensor([0.3, 0.5, 0.7]).view(1, 3, 1, 1).expand(200, 3, 4, 4)
    red, green, blue = adjust_batch_contrast(image, seeded()).mean(dim=(2, 3)).T
    assert torch.allclose(green, torch.full((200,), 0.5), atol=1e-6)
    assert torch.allclose(0.5 - red, blue - 0.5, atol=1e-6)
    assert_even((blue - red) / 0.4, 0.8, 1.2)


def test_contrast_leaves_an_image_of_one_grey_as_it_is():
    grey = torch.full((8, 3, 4, 4), 0.3)
    assert torch.allclose(adjust_batch_contrast(grey, seeded()), grey, atol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.5])
def test_the_strength_bounds_the_factors(strength):
    grey = adjust_batch_brightness(torch.full((300, 3, 2, 2), 0.5), seeded(), strength)
    tones = adjust_batch_contrast(two_tone_images(300, 0.4, 0.6), seeded(), strength)
    for factors in (grey[:, 0, 0, 0] / 0.5, (tones[:, 0, 0, -1] - tones[:, 0, 0, 0]) / 0.2):
        if strength:
            assert_even(factors, 1 - strength, 1 + strength)
        else:
            assert torch.allclose(factors, torch.ones(300), atol=1e-5)


# Rotation


@each_size
def test_a_rotation_turns_about_the_centre_and_neither_stretches_nor_shears(height, width):
    matrices, shifts = measured_maps(rotate_batch(ramps(50, height, width), seeded()))
    identity = torch.eye(2, dtype=torch.float64).expand(50, 2, 2)
    assert torch.allclose(matrices @ matrices.mT, identity, atol=1e-3)
    assert torch.allclose(torch.linalg.det(matrices), torch.ones(50).double(), atol=1e-3)
    assert torch.allclose(shifts, torch.zeros(50, 2).double(), atol=1e-2)


@each_size
def test_a_rotation_is_the_one_that_scipy_computes_for_the_same_angle(height, width):
    turned = rotate_batch(ramps(10, height, width), seeded(), degrees=25.0)
    angles = measured_degrees(turned)
    assert np.abs(angles).max() > 10
    image = ramps(1, height, width)[0].numpy()
    for view, angle in zip(turned.numpy(), angles, strict=True):
        for channel in range(3):
            expected = ndimage.rotate(image[channel], angle, reshape=False, order=1, mode="reflect")
            assert np.allclose(view[channel], expected, atol=2e-3)


@pytest.mark.parametrize("degrees", [10.0, 45.0])
def test_angles_are_spread_evenly_between_plus_and_minus_the_limit(degrees):
    angles = measured_degrees(rotate_batch(ramps(500, 16, 20), seeded(), degrees))
    assert_even(angles, -degrees, degrees)


def test_angles_reach_ten_degrees_and_no_further_unless_asked():
    angles = measured_degrees(rotate_batch(ramps(500, 16, 16), seeded()))
    assert_even(angles, -10.0, 10.0)
    assert np.abs(angles).max() > 9.5


@each_size
def test_the_corners_are_filled_by_reflection_so_that_white_stays_white(height, width):
    white = torch.ones(20, 3, height, width)
    views = rotate_batch(white, seeded(), degrees=45.0)
    assert torch.allclose(views, white, rtol=0, atol=1e-6)


def test_a_rotation_by_no_degrees_changes_nothing():
    images = random_images(4, 9, 14)
    assert torch.allclose(rotate_batch(images, seeded(), degrees=0.0), images, atol=1e-5)


# Noise


def test_noise_has_mean_0_and_a_deviation_of_each_images_own_from_0_to_3_hundredths():
    size = 24
    noise = add_noise_to_batch(torch.full((300, 3, size, size), 0.5), seeded()) - 0.5
    assert abs(noise.mean()) < 4 * 0.03 / math.sqrt(noise.numel())
    deviations = noise.std(dim=(1, 2, 3))
    assert deviations.max() < 0.03 * 1.06  # the deviation of 1,728 draws is known to 2 %
    assert stats.kstest(deviations.numpy(), "uniform", args=(0, 0.03)).pvalue > 0.001


def test_noise_is_gaussian_and_another_in_every_pixel_channel_and_image():
    noise = add_noise_to_batch(torch.full((20, 3, 16, 16), 0.5), seeded(), max_std=0.1) - 0.5
    noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.001
    for dim in range(4):
        shifted = noise.roll(1, dim)
        assert abs((noise * shifted).mean()) < 4 / math.sqrt(noise.numel())


@pytest.mark.parametrize("max_std", [0.0, 0.01, 0.1])
def test_the_deviation_of_the_noise_can_be_bounded(max_std):
    noise = add_noise_to_batch(torch.full((100, 3, 24, 24), 0.5), seeded(), max_std) - 0.5
    deviations = noise.std(dim=(1, 2, 3))
    assert 0.9 * max_std <= deviations.max() <= 1.06 * max_std


# All together


def test_training_views_show_all_four_orientations_equally_often():
    quadrants = torch.tensor([[0.2, 0.4], [0.6, 0.8]]).repeat_interleave(8, 0)
    images = quadrants.repeat_interleave(8, 1).expand(400, 3, 16, 16).clone()
    views = torch.nn.functional.avg_pool2d(augment_batch(images, seeded()), 8)[:, 0]
    orders = [tuple(view.flatten().argsort().tolist()) for view in views]
    counts = {order: orders.count(order) for order in set(orders)}
    assert counts.keys() == {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}
    assert min(counts.values()) >= 65  # 100 expected, standard deviation 8.7


def test_training_views_are_turned_brightened_changed_in_contrast_and_noisy():
    views = augment_batch(two_tone_images(300, dark=0.4, light=0.6, size=32), seeded())
    means = views.mean(dim=(1, 2, 3))
    assert 0.395 < means.min() < 0.42
    assert 0.58 < means.max() < 0.605

    left, right = views[..., 4:8].mean(dim=(1, 2, 3)), views[..., 24:28].mean(dim=(1, 2, 3))
    contrasts = (left - right).abs() / means  # brightness alone leaves it at 0.4
    assert contrasts.min() < 0.34
    assert contrasts.max() > 0.46

    noise = views[..., 4:8].std(dim=(1, 2, 3))
    assert noise.max() > 0.02

    light = (views.mean(dim=1) > means[:, None, None]).float().sum(dim=2)
    leaning = light[:, :4].mean(dim=1) - light[:, -4:].mean(dim=1)
    assert 3 < leaning.max() < 6  # 28 rows times tan(10 degrees) are 4.9 pixels
    assert -6 < leaning.min() < -3


# Policies


def test_the_examples_show_each_augmentation_alone_and_then_all_together():
    names, views = example_views(seeded(), num_combined=3)
    assert len(names) == len(views.angle) == 9
    assert names[:2] == ["flipped left to right", "flipped top to bottom"]
    assert names[6:] == ["all together"] * 3
    image = random_images(1)
    shown = apply_views(image.expand(9, -1, -1, -1), views)
    torch.testing.assert_close(shown[0], image[0].flip(2))
    torch.testing.assert_close(shown[1], image[0].flip(1))
    brightness, contrast = (float(name.split(" ×\u00a0")[1]) for name in names[3:5])
    torch.testing.assert_close(shown[3], (image[0] * brightness).clamp(0, 1), atol=0.006, rtol=0)
    mean = image[0].mean()
    expected = (mean + (image[0] - mean) * contrast).clamp(0, 1)
    torch.testing.assert_close(shown[4], expected, atol=0.004, rtol=0)
    deviation = float(names[5].removeprefix("noise of standard deviation "))
    assert deviation == pytest.approx(views.noise_std[5].item(), abs=0.005) and deviation > 0
    for alone in (views.angle[[0, 1, 3, 4, 5]].abs(), views.noise_std[:5], views.angle[2:3] == 0):
        assert not alone.any()


@pytest.mark.parametrize("seed", range(8))
def test_the_example_of_a_rotation_says_by_how_much_and_which_way(seed):
    names, views = example_views(seeded(seed))
    words = names[2].split()
    assert words[:2] == ["rotated", "by"]
    # A dot right of the centre: clockwise, it goes down.
    image = torch.zeros(1, 3, 101, 101)
    image[..., 50, 90] = 1
    shown = apply_views(image.expand(len(names), -1, -1, -1), views)[2, 0]
    row, column = np.unravel_index(int(shown.argmax()), shown.shape)
    clockwise = math.degrees(math.atan2(row - 50, column - 50))
    degrees = float(words[2].removesuffix("°")) * (1 if words[3] == "clockwise" else -1)
    assert clockwise == pytest.approx(degrees, abs=1.5)
    assert 5 < abs(degrees) <= 10


def test_policies_have_names_and_an_unknown_one_is_refused():
    assert resolve_policy(True) == resolve_policy("standard") == POLICIES["standard"]
    assert resolve_policy(False) == resolve_policy("none") == ()
    with pytest.raises(ValueError, match="'strong'; the policies are none, standard"):
        resolve_policy("strong")
