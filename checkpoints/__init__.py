"""The bundled tiny checkpoint and the script that trains it."""
