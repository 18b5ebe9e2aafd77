"""Looking at data: values in a few words, pictures on a contact sheet."""
