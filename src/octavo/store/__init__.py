"""Files to modules and back: checkpoints, adapters, exports. No pickle is ever written."""
