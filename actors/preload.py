"""What every one of Ray's workers imports as it comes up, before it has work: what all of Herder's actors need.

Ray would import it when the actor is created, at full priority and beside those that serve.
"""

from actors.giving_way import import_giving_way

import_giving_way("actors.attention", "actors.expert")
