"Tacotron 2 and its parts. Imports torch and numpy only."
