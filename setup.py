"""Packaging entry for tools that want a setup.py: pyproject.toml declares everything."""

from setuptools import setup

setup()
