"""The families whose builders serve other tests and the built-in models, too."""

from tests import tiny

BUILDERS = {"llava": tiny.llava, "idefics3": tiny.idefics3, "qwen2_vl": tiny.qwen2_vl}
