"""SGLang before 0.5.14 imports names of this submodule also on a CPU."""

from . import __getattr__ as __getattr__
