import sys

from python_tests.compile_gate import main

sys.exit(main())
