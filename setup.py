"""What pyproject.toml cannot say: the recipes, which lie beside the package in a clone, are inside it in a wheel."""

from setuptools import find_packages, setup

SHIPPED = "qtuning_trl.shipped_recipes"

setup(
    packages=[*find_packages(include=["qtuning_trl*"]), SHIPPED],
    package_dir={SHIPPED: "recipes"},
    package_data={
        "qtuning_trl": ["py.typed", "report/report.html", "demo/base_model/*", "studies/paper_tasks/*.yaml"],
        SHIPPED: ["*.yaml", "*.jinja", "*.md", "*/*.yaml"],
    },
)
