"""How many examples a property test tries: 20, or 100 with HYPOTHESIS_PROFILE=many, as in `make test-full`. They are
the same ones each time, so that a change is not judged by luck. `HYPOTHESIS_PROFILE=new pytest -m hypothesis -n 2`
looks for what nobody has thought of: 2,000 examples, new ones each time."""

import os

from hypothesis import HealthCheck, settings

# a slow machine is no reason to fail, and nothing is written into the folder where the tests run
few = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], max_examples=20,
               derandomize=True)
profiles = {'few': few, 'many': settings(few, max_examples=100),
            'new': settings(few, max_examples=2000, derandomize=False)}
quick = profiles[os.environ.get('HYPOTHESIS_PROFILE', 'few')]
