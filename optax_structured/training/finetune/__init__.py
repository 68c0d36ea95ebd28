"""The task `finetune`: a network that knows some digits is adapted to others."""
