"""What exists because of a compiler: each part says for which backend, and what it gains."""
