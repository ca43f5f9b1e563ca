"""Named experiments: plain functions that return a ``Recipe``. ``titans train --list`` prints them."""

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

from titans.errors import UserError, unknown_name
from titans.recipes.ablations import ABLATIONS, SHORT_ABLATIONS
from titans.recipes.babilong import (
    babilong_lmm,
    babilong_mag,
    babilong_mag_f256,
    babilong_mag_f256_second,
    babilong_mag_f256_told,
    babilong_qa1_mag,
    babilong_qa1_mag_f256,
    babilong_qa1_mag_f256_second,
    babilong_qa1_mag_f256_told,
    babilong_sliding,
)
from titans.recipes.demo import demo_mac
from titans.recipes.mqar import (
    mqar_attention,
    mqar_lmm,
    mqar_lmm_f256,
    mqar_lmm_linear,
    mqar_mac,
    mqar_mac_token,
    mqar_mag,
    mqar_mal,
    mqar_sliding,
    short_mqar_mac,
    short_mqar_mac_token,
    short_mqar_mag,
    short_mqar_sliding,
)
from titans.recipes.needle import (
    needle_attention,
    needle_lmm,
    needle_lmm_f256,
    needle_lmm_linear,
    needle_lmm_rectified,
    needle_mac,
    needle_mac_f256,
    needle_mac_f256_token,
    needle_mac_f256_told,
    needle_mag,
    needle_mag_c16,
    needle_mag_f256,
    needle_mag_f256_second,
    needle_mag_f256_told,
    needle_mag_late,
    needle_mag_token,
    needle_mal,
    needle_sliding,
)
from titans.recipes.tiny import tiny_attention, tiny_lmm, tiny_mac, tiny_mag, tiny_mal
from titans.training.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(demo_mac, tiny_lmm, tiny_mac, tiny_mag, tiny_mal, tiny_attention),
        *(needle_lmm, needle_lmm_rectified, needle_lmm_linear, needle_lmm_f256),
        *(needle_mac, needle_mac_f256, needle_mac_f256_token, needle_mac_f256_told),
        *(needle_mag, needle_mag_token, needle_mag_late, needle_mag_c16),
        *(needle_mag_f256, needle_mag_f256_second, needle_mag_f256_told),
        *(needle_mal, needle_attention, needle_sliding),
        *(babilong_qa1_mag, babilong_qa1_mag_f256, babilong_mag, babilong_mag_f256),
        *(babilong_qa1_mag_f256_second, babilong_mag_f256_second, babilong_lmm, babilong_sliding),
        *(babilong_qa1_mag_f256_told, babilong_mag_f256_told),
        *(mqar_lmm, mqar_lmm_linear, mqar_lmm_f256),
        *(mqar_mag, mqar_mac, mqar_mac_token, mqar_mal, mqar_attention, mqar_sliding),
        *(short_mqar_mag, short_mqar_mac, short_mqar_mac_token, short_mqar_sliding),
        *ABLATIONS,
        *SHORT_ABLATIONS,
    )
}


def load_recipe(name: str) -> Recipe:
    """The recipe called ``name``, or the one that ``path/to/file.py:function`` returns.

    Raises:
        UserError: no recipe of that name (the nearest is proposed), no such file or function in it, or the
            function does not return a ``Recipe``.
    """
    if ".py" in name:
        function = _from_file(name)
    elif name in RECIPES:
        function = RECIPES[name]
    else:
        raise unknown_name("recipe", name, RECIPES)
    recipe = function()
    if not isinstance(recipe, Recipe):
        raise UserError(f"{name}: expected the function to return a Recipe, got {type(recipe).__name__}")
    return recipe


def _from_file(name: str) -> Callable[[], Recipe]:
    file, _, function_name = name.rpartition(":")
    if not file or not function_name:
        raise UserError(f"{name}: expected path/to/file.py:function")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file (a recipe is a name, or path/to/file.py:function)")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
    if function_name not in functions:
        raise unknown_name(f"function in {file}", function_name, functions)
    return functions[function_name]
