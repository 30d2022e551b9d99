"""parse_config.py FILE.toml ...: what the trainer's reading of a --config_file and our patch make of each, as
JSON; nothing is trained.

A file's answer is its Namespace, or the sentence that refuses it.
"""

import json
import runpy
import sys

import checkouts

sys.path.insert(0, str(checkouts.first()))


def read(file):
    sys.argv = ["sdxl_train.py", "--config_file", file]
    parser = setup_parser()
    try:
        return vars(train_util.read_config_from_file(parser.parse_args(), parser))
    except FlagError as error:
        return str(error)


if __name__ == "__main__":
    import sdxl_fixes.kohya
    from sdxl_fixes.errors import FlagError

    sdxl_fixes.kohya.install()
    setup_parser = runpy.run_path(str(checkouts.first() / "sdxl_train.py"), run_name="config")["setup_parser"]
    from library import train_util

    print(json.dumps([read(file) for file in sys.argv[1:]], default=str))
