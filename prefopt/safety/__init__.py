"""What keeps a user's files, secrets and screen safe: whole files, no secrets, no pickles, errors meant for people.

Imports nothing of the package, so that every room can use it.
"""
