"""STU-Net and other large-scale pretraining for nnU-Net v2, as a plugin: no fork, no patch, no
copy."""

import os as _os

__version__ = "0.1.0"

# ``trainers/`` and ``plans/`` stand beside this folder in the repository and inside it once
# installed (setup.py, package_dir). This lets ``python -m stunet_plugin`` and ``python -m pytest``
# work from a checkout that comes first on the path.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "trainers")) and _os.path.isfile(
    _os.path.join(_here, "..", "trainers", "stunet_trainers.py")
):
    __path__.append(_os.path.dirname(_here))
