"""STU-Net and other large-scale pretraining for nnU-Net v2, as a plugin: no fork, no patch, no
copy."""

import os as _os
from typing import Any as _Any

__version__ = "0.2.0"

# ``trainers/`` and ``plans/`` stand beside this folder in the repository and inside it once
# installed (setup.py, package_dir). This lets ``python -m stunet_plugin`` and ``python -m pytest``
# work from a checkout that comes first on the path.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "trainers")) and _os.path.isfile(
    _os.path.join(_here, "..", "trainers", "stunet_trainers.py")
):
    __path__.append(_os.path.dirname(_here))


def segment(image: _Any, model: _Any, **settings: _Any) -> _Any:
    """Segment one scan with a model folder of nnU-Net or a published model.

    Examples:
        >>> import stunet_plugin
        >>> found = stunet_plugin.segment("ct.nii.gz", "MODEL_FOLDER", structures=["liver"])
        >>> found.labels.shape  # (z, y, x), as the image file
        (30, 34, 40)
        >>> [row.name for row in found.statistics()]
        ['liver']

    Args:
        image: path of a file or of a folder with one DICOM series, paths of one file per channel,
            or an array (z, y, x) or (channel, z,
            y, x) with ``spacing=`` (z, y, x) in mm, oriented as the model's training images.
        model: folder, name (``stunet models``) or ``hf://`` address.
        settings: ``structures``, ``device`` and the others of
            :class:`stunet_plugin.segmentation.segmenter.Segmenter`.

    Returns:
        :class:`stunet_plugin.segmentation.segmenter.Segmentation`: ``labels``, ``names`` and
        ``statistics()``.

    Raises:
        PluginError: wrong input; the message says what to do.
    """
    from importlib import import_module

    # By name: no module of the package depends on it.
    return import_module("stunet_plugin.segmentation.segmenter").segment(image, model, **settings)
