"""Starting the processes of a run, watching over them and ending them together; nothing here loads paddle."""
