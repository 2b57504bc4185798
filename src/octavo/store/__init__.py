"""Files to modules and back: checkpoints, adapters, training checkpoints, exports. No pickle is ever written."""
