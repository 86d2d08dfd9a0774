"""A test set for runs that must leave theirs alone."""


class Untouchable:
    """A test set that must not be looked at."""

    def __getattribute__(self, name):
        raise AssertionError(f"the test set was asked for {name}")

    def __len__(self):
        raise AssertionError("the test set was asked for its length")


def without_test_set(load):
    """A loader of training and test set that gives no test set which could be looked at."""

    def loaded(*arguments, **options):
        train, _ = load(*arguments, **options)
        return train, Untouchable()

    return loaded
