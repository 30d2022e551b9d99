"""parse_recipe.py SCRIPT RECIPE.toml FLAGS...: what the trainer and our adapter make of a recipe, as JSON;
nothing is trained.

``args`` is the Namespace after kohya's own reading of --config_file and our checks, ``unknown`` the recipe's
keys that its parser has not, ``refused`` the values that it would not take on the command line (a TOML file
is not checked), ``subsets`` kohya's reading of the data set.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path

import checkouts

sys.path.insert(0, str(checkouts.first()))


def refused(action, value):
    """Whether the parser would not take ``value`` on the command line, or would make another kind of value of
    it."""
    if isinstance(action, argparse._StoreTrueAction):
        return not isinstance(value, bool)
    if isinstance(value, list) != (action.nargs == "*"):
        return True
    for one in value if isinstance(value, list) else [value]:
        read = action.type(str(one)) if action.type else str(one)
        alike = (
            type(one) is type(read)
            or isinstance(read, Path)
            or (isinstance(read, float) and type(one) is int)
        )
        if not alike or (action.choices is not None and one not in action.choices):
            return True
    return False


if __name__ == "__main__":
    script, recipe, *flags = sys.argv[1:]
    import sdxl_fixes.kohya

    sdxl_fixes.kohya.install()
    setup_parser = runpy.run_path(str(checkouts.first() / script), run_name="recipe")["setup_parser"]
    import toml
    from library import config_util, sdxl_train_util, train_util

    sys.argv = [script, "--config_file", recipe, *flags]
    parser = setup_parser()
    args = train_util.read_config_from_file(parser.parse_args(), parser)
    train_util.verify_training_args(args)
    sdxl_train_util.verify_sdxl_training_args(args)
    actions = {action.dest: action for action in parser._actions}
    keys = {key: value for section in toml.load(recipe).values() for key, value in section.items()}
    generator = config_util.BlueprintGenerator(
        config_util.ConfigSanitizer(True, True, args.masked_loss, True)
    )
    user_config = config_util.load_user_config(Path(recipe).parent / args.dataset_config)
    datasets = generator.generate(user_config, args).dataset_group.datasets
    answer = {
        "args": vars(args),
        "unknown": [key for key in keys if key not in actions],
        "refused": [key for key, value in keys.items() if key in actions and refused(actions[key], value)],
        "datasets": [vars(dataset.params) for dataset in datasets],
        "subsets": [vars(subset.params) for dataset in datasets for subset in dataset.subsets],
    }
    print(json.dumps(answer, default=str))
