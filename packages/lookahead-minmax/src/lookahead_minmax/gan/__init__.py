"""GAN experiments of the paper: networks, data, training; imported only where they are used."""
