"""The part of the build that pyproject.toml cannot say: packages are found, and two families of them live at the top.

`patches/` and `policies/` install as `kvpolicy.patches` and `kvpolicy.policies`, so that nothing but `kvpolicy` ever
lands in site-packages. `kvpolicy/__init__.py` has the other half, for a checkout that is not installed.
"""

from setuptools import find_packages, setup

AT_THE_TOP = ("patches", "policies")

setup(
    packages=[
        *find_packages(include=["kvpolicy", "kvpolicy.*"]),
        *(f"kvpolicy.{name}" for top in AT_THE_TOP for name in find_packages(include=[top, f"{top}.*"])),
    ],
    package_dir={f"kvpolicy.{top}": top for top in AT_THE_TOP},
)
