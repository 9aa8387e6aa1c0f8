"""For all tests."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a shell; some tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
