"""Codes and scales chosen for what a text makes of the layers."""
