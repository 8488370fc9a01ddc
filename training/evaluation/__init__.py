"""How trained connectors are compared."""
