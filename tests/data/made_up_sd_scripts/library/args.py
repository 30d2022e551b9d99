def verify_training_args(args):
    args.verified = True


def read_config_from_file(args, parser):
    return args
