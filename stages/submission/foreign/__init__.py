"""Record folders of the challenge, whoever made them: read leniently, judged strictly."""
