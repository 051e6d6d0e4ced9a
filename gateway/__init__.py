"""The gateway: accounts, sessions, access tokens and the keys that verify them. It is not a proxy."""
