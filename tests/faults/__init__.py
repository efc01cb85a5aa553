"""Attacks: what is promised must hold while servers, networks and clients break."""
