"""Verification: are two faces the same person?  The protocol (numpy), the embeddings over ranks, the gallery."""
