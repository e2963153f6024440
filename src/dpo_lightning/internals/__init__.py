"""What we use of other libraries that they do not promise to keep: one file per library, one function per use.

Each function says what it uses and why there is no public way. Each has a test in `tests/internals` that fails with the
library's version and our feature in its message when a new version changes what is used.
"""
