"""What was decided and what happened, for people: pictures, and a page of HTML with all of them."""
