"""The demo: a tiny pretrained GPT-2 and a text-to-SQL data set that ship with the package."""
