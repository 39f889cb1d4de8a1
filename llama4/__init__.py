"""Llama 4 on one device: the network in plain torch, its KV pages and its weights."""
