"""Conversations: their template, and what other programs answer over an API."""
