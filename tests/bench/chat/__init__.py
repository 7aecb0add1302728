"""How the built-in chat data set was made: its words, its phrases, its rows."""
