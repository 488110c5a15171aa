"""Stochastic Downsampling Point (Kuen et al. 2018): train one convolutional network once, run it at dozens of costs."""
