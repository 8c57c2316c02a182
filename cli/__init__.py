"""The command lines. May import everything; only the `__main__` blocks of the programs, and the tests, import it.

`pip install .` puts this repository into site-packages as one package, gpt2_numpy, whose commands start here. Its
modules are imported by the names that they have in the repository: its folder comes first on sys.path, as the folder of
a script does.
"""

import os
import sys

if __name__ == "gpt2_numpy.cli":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
