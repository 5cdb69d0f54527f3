"""Safety of a user's files, secrets and screen: whole files, no secrets, no pickles, errors for users.

Imports nothing of the package, so that every room can use it.
"""
