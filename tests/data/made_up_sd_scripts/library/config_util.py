import library.dataset as dataset_util

COLLATOR = dataset_util.collator_class


def generate_dataset_group_by_blueprint(dataset_group_blueprint):
    return dataset_util.DatasetGroup() if dataset_group_blueprint is None else dataset_group_blueprint
