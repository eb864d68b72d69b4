"""Packages of the project; everything else stands in pyproject.toml.

``trainers/`` and ``plans/`` at the top of the repository are the packages
``stunet_plugin.trainers`` and ``stunet_plugin.plans``, so no generic name lands in site-packages.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["stunet_plugin", "stunet_plugin.*"]),
        "stunet_plugin.trainers",
        "stunet_plugin.plans",
    ],
    package_dir={"stunet_plugin.trainers": "trainers", "stunet_plugin.plans": "plans"},
    package_data={
        "stunet_plugin": ["py.typed"],
        "stunet_plugin.data": ["*.json"],
        "stunet_plugin.crosseval": ["*.j2"],
        "stunet_plugin.weights": ["*.j2"],
    },
)
