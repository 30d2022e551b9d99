class SdxlTextEncodingStrategy:
    def _get_hidden_states_sdxl(self, input_ids1, input_ids2):
        return input_ids1

    def encode_tokens_with_weights(self, tokenize_strategy, models, tokens_list, weights_list):
        return self._get_hidden_states_sdxl(*tokens_list)


class SdxlTextEncoderOutputsCachingStrategy:
    def cache_batch_outputs(self, tokenize_strategy, models, text_encoding_strategy, infos):
        return infos
