"""The second main job: pretrain a small language model, its optimizer state in low rank."""
