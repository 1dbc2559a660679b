"""A small Llama that ships in the package, and the text it is measured on."""
