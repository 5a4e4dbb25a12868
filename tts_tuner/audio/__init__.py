"From sound to mel spectrograms and back."
