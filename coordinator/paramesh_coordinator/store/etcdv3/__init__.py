"""Generated from `protos/`; see `tools/gen_protos.py`."""
