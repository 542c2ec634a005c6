"""How many examples a property test tries: 20, the same ones each time. With HYPOTHESIS_PROFILE=many in the
environment, as `make test-full` sets it, 100, and new ones each time."""

import os

from hypothesis import HealthCheck, settings

# a slow machine is no reason to fail, and nothing is written into the folder where the tests run
few = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], max_examples=20,
               derandomize=True)
many = settings(few, max_examples=100, derandomize=False)
quick = many if os.environ.get('HYPOTHESIS_PROFILE') == 'many' else few
