"""Where a text is cut, found by trying all."""

import regex


def largest_cut(text, tokenizers, max_length):
    """By trying all: the largest end of a word at which both limits hold; 0: there is none.

    Of a grapheme, if that is in the first half of what fits: of the text before the first token
    that is too many.
    """

    def fits(cut):
        return all(
            len(tokenizer(text[:cut])["input_ids"]) <= max_length for tokenizer in tokenizers
        )

    if fits(len(text)):
        return len(text)
    best_word = max(filter(fits, word_ends(text)), default=0)
    if 2 * best_word >= min(start_of_overflow(text, each, max_length) for each in tokenizers):
        return best_word
    return max(filter(fits, grapheme_ends(text)), default=0)


def word_ends(text):
    return [end for end in range(1, len(text)) if text[end].isspace() > text[end - 1].isspace()]


def grapheme_ends(text):
    return [match.end() for match in regex.finditer(r"\X", text)]


def start_of_overflow(text, tokenizer, max_length):
    bare = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    room = max_length - tokenizer.num_special_tokens_to_add()
    return bare[room][0] if len(bare) > room else len(text)
