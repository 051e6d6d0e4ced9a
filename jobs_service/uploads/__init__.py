"""Files that users bring: announced, put into the store by a presigned URL, checked, kept for a while. docs/uploads.md has the whole way.

`intake` takes and checks, `turns` says whose turn it is, `checker` runs `media_check` on a file, `sweeper` removes.
"""
