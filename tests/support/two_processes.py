"""Two processes on the CPU: ``[sys.executable, *TWO, script, arguments...]``.

As each of them, this file runs the script and leaves without Python's finalization: on torch 2.13 a thread of
gloo that lets go of a tensor meanwhile aborts the process after its work is done (pytorch#179291), often on a
busy machine.
"""

import atexit
import os
import runpy
import sys
import traceback
from pathlib import Path

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__)

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    failed = False
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        failed = bool(stop.code)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        failed = True
        traceback.print_exc()
    atexit._run_exitfuncs()  # such as the end of a data loader's workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed)
