UPLOADED = []


def upload(args, src, dest_suffix="", force_sync_upload=False):
    UPLOADED.append((src, dest_suffix, force_sync_upload))
