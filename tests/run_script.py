"""Runs a script in a process of the fork server, as `python SCRIPT WORDS` would (see conftest.py).

`runpy.run_path` gives `script`, `words`, `environment`, `folder`, `streams` and `calls` as globals.
"""

import os
import runpy
import sys

for function, arguments in calls:  # noqa: F821
    function(*arguments)
os.chdir(folder)  # noqa: F821
os.environ.clear()
os.environ.update(environment)  # noqa: F821
for number, path in enumerate(streams, start=1):  # noqa: F821
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, number)
    os.close(file)
sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
sys.argv = [script, *words]  # noqa: F821
sys.path.insert(0, os.path.dirname(script))  # noqa: F821
runpy.run_path(script, run_name="__main__")  # noqa: F821
